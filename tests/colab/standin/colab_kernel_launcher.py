"""Starts a kernel as Colab's module of this name does: google.colab is there before any cell."""

import google.colab  # noqa: F401
from ipykernel import kernelapp

if __name__ == "__main__":
    kernelapp.launch_new_instance()
