#!/usr/bin/env bash
# One stage of a trial on a GPU, ended after so many seconds; whatever happens, small files are left.
#
#   benchmarks/gpu/trial.sh right 240                    # the tests marked gpu
#   benchmarks/gpu/trial.sh fast 240                     # tokens per second, beside PEFT's
#   benchmarks/gpu/trial.sh true 500 small_loradrop --data.task sst2 --data.data_dir DATA
#                                                        # as many runs of a comparison as fit
#
# Each stage stands alone. OUT says where its files go (runs/gpu). TINY=1 tries a stage on small
# shapes, on a CPU too. RUNS=... is a comparison's folder (runs/compare/STUDY), NAME=... what its
# results are kept under (STUDY), WORKERS=... how many runs share the card (4). A kit of
# scripts/offline_kit.sh that lies here is installed first.
set -uo pipefail
cd "$(dirname "$0")/../.."
STAGE=${1:?right, fast or true} LIMIT=${2:?seconds}
shift 2
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
BEGAN=$SECONDS

if [ -f kit/install.sh ] && ! "$PYTHON" -c 'import jsonargparse, lightning_peft' 2>/dev/null; then
    bash kit/install.sh >"$OUT/install.log" 2>&1 || echo "the kit was not installed, see install.log"
fi

within() { # The rest of the time, and ten seconds to leave what there is; CODE is how it ended.
    local left=$((LIMIT - (SECONDS - BEGAN)))
    # To timeout, 0 means for ever.
    timeout --signal TERM --kill-after 10 "$((left > 1 ? left : 1))" "$@" >"$OUT/$STAGE.log" 2>&1
    CODE=$?
}

case "$STAGE" in
    right)
        # --tb=short, since a log has to be small enough to come back.
        within "$PYTHON" -m pytest -m "gpu and not long" tests/gpu -p no:cacheprovider --tb=short -q \
            -rA ${TINY:+-k "PrunedLoRA or quantized"} --junit-xml "$OUT/right.xml"
        ;;
    fast)
        within "$PYTHON" benchmarks/gpu/fast.py --output "$OUT/fast.jsonl" ${TINY:+--tiny} "$@"
        ;;
    true)
        STUDY=${1:?a comparison, or the name of one in configs/compare}
        shift
        [ -f "$STUDY" ] || STUDY="configs/compare/$STUDY.yaml"
        NAME=${NAME:-$(basename "$STUDY" .yaml)}
        RUNS=${RUNS:-runs/compare/$NAME}
        "$PYTHON" benchmarks/pretrained.py unpack "$NAME" "$RUNS" 2>/dev/null
        within "$PYTHON" -m lightning_peft compare --config "$STUDY" \
            --folder "$RUNS" --workers "${WORKERS:-4}" "$@"
        "$PYTHON" benchmarks/pretrained.py pack "$RUNS" "$NAME" --folder "$OUT"
        ;;
    *)
        echo "$STAGE is no stage; there are right, fast and true" >&2
        exit 2
        ;;
esac
tail -c 100000 "$OUT/$STAGE.log" >"$OUT/$STAGE.tail" && mv "$OUT/$STAGE.tail" "$OUT/$STAGE.log"
"$PYTHON" benchmarks/gpu/outcome.py "$STAGE" "$CODE" "$((SECONDS - BEGAN))" >"$OUT/$STAGE.json"
cat "$OUT/$STAGE.json"
# 124 and 137: its time was up, which is no failure.
[ "$CODE" -eq 0 ] || [ "$CODE" -eq 124 ] || [ "$CODE" -eq 137 ]
