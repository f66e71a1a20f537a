"""From records to batches: what every task shares, and an author of one need not read.

In the order in which data pass through: `files` and `records` read them, `chats` reads
conversations; `examples` (prompts with responses) and `pairs` (labelled texts) make token ids,
which `cache` keeps; `batches`, `labelled` and `packing` make rows into batches; `samplers` choose
the rows, and `loader` yields the batches and counts their targets. `tokenized` is the Lightning
data module that ties these together. `arguments` refuses what a user got wrong.
"""
