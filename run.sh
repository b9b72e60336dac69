#!/usr/bin/env bash
# The front door: ./run.sh WORD. It makes the virtual environment where there is none, installs, and prints what it runs.
set -euo pipefail
cd "$(dirname "$0")"

environment() {  # environment REQUIREMENTS...: .venv with these installed; nothing to do where they already are
    [ -x .venv/bin/python ] || { echo "+ python3 -m venv .venv"; python3 -m venv .venv; }
    for file in "$@"; do
        case "$(cat .venv/installed 2>/dev/null)" in
            *"$file $(cksum < "$file")"*) ;;
            *) echo "+ pip install -r $file"
               DS_BUILD_OPS=0 .venv/bin/python -m pip install -q -r "$file"
               echo "$file $(cksum < "$file")" >> .venv/installed ;;
        esac
    done
}

show() {  # show COMMAND...: prints it, runs it, and says how long it took
    local start=$SECONDS
    echo "+ $*"
    PATH="$PWD/.venv/bin:$PATH" "$@"
    echo "  ($((SECONDS - start)) s)"
}

case "${1:-}" in
    demo)
        environment requirements.txt
        # a port of its own, so that the demo runs beside another training
        port=$(.venv/bin/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")
        for script in sft reward ppo; do show deepspeed --master_port "$port" "$script.py"; done
        show python -m toy.show
        show python chat.py --model runs/toy/ppo --versus runs/toy/sft --prompt "What is the capital of France?" --max-tokens 40 ;;
    hacking)
        environment requirements.txt
        [ -d runs/toy/sft ] || show deepspeed sft.py
        show python -m toy.hacking ;;
    seeds)
        environment requirements.txt
        show python -m toy.seeds 1 2 3 4 5
        show python -m toy.seeds --lora 1 2 3 ;;
    test)
        environment requirements.txt tests/requirements.txt
        shift
        echo "+ python -m pytest tests $*"
        exec .venv/bin/python -m pytest tests "$@" ;;
    faults)
        environment requirements.txt tests/requirements.txt
        shift
        show python -m pytest tests/test_{faults,fuzz,machines,memory,soak}.py --full -rs -s "$@" ;;
    bench)
        environment requirements.txt bench/requirements.txt
        for script in generate sft_step ppo_step; do show python "bench/$script.py"; done ;;
    *)
        echo "usage: ./run.sh demo                      the whole recipe on a tiny world, in minutes"
        echo "       ./run.sh hacking                   PPO with and without the KL term against a poor reward model, in a picture"
        echo "       ./run.sh seeds                     the whole recipe for five seeds, and with LoRA for three; most of an hour"
        echo "       ./run.sh test [pytest's options]   all tests; -m 'not slow' leaves out what trains or starts the launcher"
        echo "       ./run.sh faults                    the tests of kills, full disks and damaged input, many times over; an hour"
        echo "       ./run.sh bench                     generate, an SFT step and a PPO step beside transformers, DeepSpeed and TRL"
        [ "${1:-}" = "" ] || exit 2 ;;
esac
