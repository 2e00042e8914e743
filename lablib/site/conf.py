"""Sphinx's configuration. Nothing is fetched while the site is built, nor when it is read."""

import os
from pathlib import Path

import mathjax  # its files, of the package django-static-mathjax
import plotly

from lablib.papers.scaffold import repository

HERE = Path(__file__).parent

project = "lablib"
author = "The lablib authors"
copyright = "The lablib authors"
extensions = ["myst_nb", "lablib.site.extension"]
nb_execution_mode = "off"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]

html_theme = "sphinx_book_theme"
html_title = "lablib"
html_static_path = [str(HERE / "static")]  # and the staged frames, see extension.py
html_css_files = ["site.css"]
html_js_files = [(name, {"defer": "defer"}) for name in ("figures.js", "access.js")]
html_favicon = str(HERE / "static" / "icon.svg")
html_copy_source = False
html_show_sourcelink = False
lablib_files = {  # once per site, beside the files of html_static_path
    "plotly.min.js": Path(plotly.__file__).parent / "package_data" / "plotly.min.js",
    "tex-svg-full.js": Path(mathjax.__file__).parent / "static/mathjax/es5/tex-svg-full.js",
}
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}
html_theme_options = {
    "repository_url": repository(),
    "repository_branch": "main",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the sidebar has a search field already
    "launch_buttons": {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
        "jupyterhub_url": os.environ.get("LABLIB_HUB", ""),
        "notebook_interface": "jupyterlab",
    },
}
