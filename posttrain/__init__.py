"""The engine room of the cookbook: `backend` trains and samples, `renderers` turn messages into
tokens, `tracking` keeps runs.

The folders beside this one (supervised, preference, rl, envs, recipes) are the user's to read, copy
and change.
"""
