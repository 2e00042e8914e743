"""Stands for Colab's google.colab: that it is imported is all that lablib looks at."""
