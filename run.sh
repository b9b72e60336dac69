#!/usr/bin/env bash
# The front door: ./run.sh WORD. It makes the virtual environment where there is none, installs the packages,
# and prints the commands that it runs.
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

show() {  # show COMMAND...: prints the command, runs it, and prints how long it took
    local start=$SECONDS word line="+"
    for word in "$@"; do
        case "$word" in *" "*) line="$line \"$word\"" ;; *) line="$line $word" ;; esac
    done
    echo "$line"
    PATH="$PWD/.venv/bin:$PATH" "$@"
    echo "  ($((SECONDS - start)) s)"
}

tell() {  # tell TEXT: prints what the next step is, between blank lines; the lines of TEXT fit 80 columns
    printf '\n%s\n\n' "$1"
}

train() {  # train SCRIPT: runs a step of the demo, and says what came out of it
    show deepspeed --quiet --master_port "$port" "$1.py"
    echo
    .venv/bin/python -m toy.show "$1"
}

settings() {  # of what trains here
    # threads that wait for each other sleep; by default they spin, and beside other programs that costs minutes
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    # where there is no GPU, DeepSpeed warns again and again unless it is told to use the CPU
    [ -n "$(ls -d /dev/nvidia* /dev/kfd /dev/dxg 2>/dev/null)" ] || export DS_ACCELERATOR=cpu
}

demo() {  # the whole recipe
    # a free port, so that the demo runs beside another training
    port=$(.venv/bin/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")

    tell "The recipe of RLHF on a tiny world. Steps 0 to 5 take about five minutes on two
CPU cores.

Step 0: the world and the base model (a minute and a half, and only once)
RLHF starts from a base model: a language model that has read much text. This
step makes a small world of facts, such as the capital of France, and trains a
tiny LLaMA on texts about it. The step also writes the data of steps 1 to 3."
    show python -m toy

    tell "Step 1: supervised fine-tuning, SFT (about half a minute)
The base model learns to answer by imitating demonstrations: questions, each
with an answer. The demonstrations are poor on purpose (many are wrong, unsure
or rude), so the model learns to answer, but not to answer well. Measured: the
perplexity of held-out answers, which is low where the model expects them."
    train sft

    tell "Step 2: the reward model (about two minutes)
The input is pairs of answers to the same question. A label says which of the
two answers is better. A copy of the SFT model learns to give every answer a
score, so that the better answer scores higher. Measured: in how many held-out
pairs the answer that is labelled better has the higher score."
    train reward

    tell "Step 3: reinforcement learning with PPO (a minute and a half)
The SFT model answers questions, the reward model scores the answers, and PPO
makes answers with a high score more likely. A penalty, the KL term, keeps the
model near the SFT model. Measured on held-out questions: the score, how far
the model has moved (KL), and the true reward (gold). In this world a rule
computes how good an answer really is. No step is trained on that rule."
    train ppo

    tell "Step 4: the comparison (some seconds)
The base, SFT and RLHF models answer the same questions, which were held out of
all three steps. SFT lowers the true reward, because it imitates poor answers.
RLHF has to raise it."
    show python -m toy.show

    tell "Step 5: a chat (some seconds)
The RLHF model and the SFT model answer one question. For a conversation, type
python chat.py after source .venv/bin/activate."
    show python chat.py @toy/chat.args --versus runs/toy/sft --prompt "Which colour is snow?"
}

case "${1:-}" in
    demo)
        environment requirements.txt
        settings
        demo ;;
    vote)
        environment requirements.txt
        settings
        shift
        show python -m toy.vote "$@" ;;
    hacking)
        environment requirements.txt
        [ -d toy/made ] || show python -m toy
        [ -d runs/toy/sft ] || show deepspeed sft.py
        show python -m toy.hacking ;;
    seeds)
        environment requirements.txt
        show python -m toy.seeds 1 2 3 4 5
        show python -m toy.seeds --lora 1 2 3 ;;
    web)
        environment requirements.txt web/requirements.txt
        [ -d runs/toy/ppo ] || demo
        shift
        echo "+ python -m web @toy/web.args $*"
        exec .venv/bin/python -m web @toy/web.args "$@" ;;
    test)
        environment requirements.txt web/requirements.txt tests/requirements.txt
        shift
        # two files of tests at a time; -n 0 for one, as a debugger needs it
        echo "+ python -m pytest tests -n 2 --dist loadfile $*"
        exec .venv/bin/python -m pytest tests -n 2 --dist loadfile "$@" ;;
    faults)
        environment requirements.txt web/requirements.txt tests/requirements.txt
        shift
        if [ "${1:-}" = --sample ]; then
            show python -m pytest tests --sample 3
            show python tests/mutants.py --sample 4 --seed "$RANDOM"
        else
            show python -m pytest tests/test_{faults,fuzz,machines,memory,clusters,soak,trainers,bad_input,toy,bench,gpu_script,adapters}.py -m slow --full -rs -s "$@"
            show python tests/mutants.py
        fi ;;
    bench)
        environment requirements.txt bench/requirements.txt
        for script in generate sft_step ppo_step; do show python "bench/$script.py"; done ;;
    *)
        echo "usage: ./run.sh demo     the whole recipe on a tiny world, in minutes"
        echo "       ./run.sh vote     the human in RLHF: you vote on pairs of answers, the"
        echo "                         reward model learns your taste, and PPO follows;"
        echo "                         --as sure or --as curt: a rule votes in your place"
        echo "       ./run.sh web      the web page on the demo's models; with its flags, such"
        echo "                         as --vote FILE or --port 8000"
        echo "       ./run.sh test     all tests, with pytest's options; -m 'not slow' leaves"
        echo "                         out those that train or start the launcher"
        echo "       ./run.sh hacking  PPO with and without the KL term against a poor reward"
        echo "                         model, in a picture"
        echo "       ./run.sh seeds    the recipe for five seeds, and with LoRA for three;"
        echo "                         most of an hour"
        echo "       ./run.sh bench    generation, an SFT step and a PPO step beside"
        echo "                         transformers, DeepSpeed and TRL"
        echo "       ./run.sh faults   kills, full disks, damaged input and faults put into"
        echo "                         the code, many times over; more than an hour;"
        echo "                         with --sample a few of them, drawn at random"
        [ "${1:-}" = "" ] || exit 2 ;;
esac
