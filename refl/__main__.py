"""Run one of the package's commands: python -m refl score|doctor|card|merge|launch, each with --help."""

from refl.system.streams import protect_streams

if __name__ == "__main__":
    protect_streams()  # before the imports, which take seconds

import sys
from importlib import import_module

from refl.system.errors import run_as_command

COMMANDS = {
    "score": ("refl.reward.score", "score image files for a prompt"),
    "doctor": ("refl.preflight.doctor", "check everything that training needs"),
    "card": ("refl.report.card", "write the model card of a trained LoRA"),
    "merge": ("refl.model.merge", "merge a LoRA into a copy of its model"),
    "launch": ("refl.system.launch", "start a script in several processes, as accelerate launch does"),
}


def main() -> None:
    """Import the command named first and run it with the remaining arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: python -m refl COMMAND [OPTIONS]\n\ncommands:")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
        print("\npython -m refl COMMAND --help lists the options of a command.")
        return
    if name not in COMMANDS:
        print(f"error: unknown command {name}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"python -m refl {name}"]
    module = import_module(COMMANDS[name][0])
    run_as_command(module.main, lambda: getattr(module, "MEMORY_ADVICE", ""))


if __name__ == "__main__":
    main()
