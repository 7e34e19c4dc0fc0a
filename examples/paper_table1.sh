#!/usr/bin/env bash
# Table 1 of the paper for one model, on one GPU: each benchmark without and with StepFlow, at the paper's settings.
#
#   examples/paper_table1.sh                       # R1-Distill-Qwen-7B, all benchmarks
#   examples/paper_cost.py                         # first: about how long that takes
#   MODEL=stepsal/mini RECORDS=tests/records examples/paper_table1.sh    # a dry run, in seconds, without hub and GPU
#
# The environment with pip install '.[inspect,hub]' must be active. An interrupted run goes on when it is called again:
# what is done is kept, the rest is run (inspect eval-set).
set -euo pipefail
MODEL=${MODEL:-stepsal/deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
BENCHMARKS=${BENCHMARKS:-aime24 aime25 amc23 math500 gpqa-diamond}
LOGS=${LOGS:-logs/paper_table1}
RECORDS=${RECORDS:-}      # a folder of JSONL files in place of the hub
MAX_TOKENS=${MAX_TOKENS:-32768}
EXTRA=${EXTRA:-}          # further options of inspect, such as "-M dtype=bfloat16 -M batch_size=32"

for benchmark in $BENCHMARKS; do
  for stepflow in false true; do
    # shellcheck disable=SC2086
    inspect eval-set stepsal/hub -T benchmark="$benchmark" ${RECORDS:+-T file="$RECORDS/$benchmark.jsonl"} \
      --model "$MODEL" -M stepflow=$stepflow --temperature 0.6 --top-p 0.95 --max-tokens "$MAX_TOKENS" --seed 0 \
      --log-dir "$LOGS/$benchmark-stepflow-$stepflow" $EXTRA
  done
done
# LiveCodeBench: Inspect runs the programs in a sandbox (needs Docker and pip install inspect-evals)
#   inspect eval inspect_evals/livecodebench_pro --model "$MODEL" -M stepflow=true --max-tokens "$MAX_TOKENS"
python3 "$(dirname "$0")/paper_table1.py" "$LOGS"
