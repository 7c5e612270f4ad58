"""The terminal chat behind ``context-server chat``.

On a terminal the reply grows in place with the state below it. Anywhere else (a pipe, a file) lines are read as they
come, standard output holds the conversation and nothing else, and notices go to standard error. Ctrl-C cancels a reply;
at the prompt, or pressed twice, it leaves. Leaving ends nothing: a reply that is being written goes on.

A call that waits for a person is shown with its exact arguments, and asked about on a terminal. Anywhere else nobody is
there to ask, and nothing is guessed: the chat says what waits, and ends with exit code 3.
"""

from context_server.chat.prompt import run_chat

__all__ = ["run_chat"]
