"""`python -m toy` makes the toy's world and its base model in toy/made, once."""
import toy
from runtime.errors import exit_with_one_line
from toy import base
from toy.world import FACTS

def main():
    if toy.MADE.exists():
        print("toy/made is there already. Delete the folder to make it again.")
        return
    print(f"Pre-training the base model: {base.STEPS:,} steps on texts about {len(FACTS)} facts.", flush=True)
    toy.make()
    print("Made toy/made/base, the base model, and the data of the next steps:")
    for file in sorted(toy.MADE.glob("*.jsonl")):
        print(f"{len(file.read_text().splitlines()):7,} rows  toy/made/{file.name}")

if __name__ == "__main__":
    exit_with_one_line(main)
