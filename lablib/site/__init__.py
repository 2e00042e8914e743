"""The labs as a static website: notebooks staged for Sphinx, figures drawn, explorers replayed."""
