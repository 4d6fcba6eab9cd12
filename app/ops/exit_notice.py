"""A supervisord event listener that says in plain words that the trainer ended and that TensorBoard stays up."""

from __future__ import annotations

import sys

from supervisor import childutils


def exit_notice(expected: bool, url: str) -> str:
    """The sentence for the terminal.

    Args:
        expected: whether the exit code is one of those that supervisord does not answer with a new start.
        url: where TensorBoard is.
    """
    if expected:
        return f"The trainer has ended; its last lines say why. TensorBoard stays on {url}."
    return "The trainer ended unexpectedly and is started again from its last checkpoint."


def main() -> None:
    """Serves supervisord's events until it closes the pipe."""
    url = sys.argv[1]
    while True:
        _, payload = childutils.listener.wait()
        event = childutils.get_headers(payload)
        if event["processname"] == "trainer":
            print(exit_notice(event["expected"] == "1", url), file=sys.stderr, flush=True)
        childutils.listener.ok()


if __name__ == "__main__":
    main()
