"""The terminal chat behind ``context-server chat``.

On a terminal the reply grows in place with the state below it. Anywhere else (a pipe, a file) lines are read as they
come, standard output holds the conversation and nothing else, and notices go to standard error. Ctrl-C cancels a reply;
at the prompt, or pressed twice, it leaves. Leaving ends nothing: a reply that is being written goes on.
"""

from context_server.chat.conversation import run_chat

__all__ = ["run_chat"]
