"""lablib: 120 papers on efficient language modeling, each measured again in a lab.

Import what you need from the parts: `lablib.data`, `lablib.models`, `lablib.training`,
one package a theme (`lablib.language_models`, `lablib.theory`, ...) and `lablib.lab` in notebooks.
Nothing heavy is imported here.
"""

__version__ = "0.1.0"
