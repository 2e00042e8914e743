"""An nbgrader course of chosen labs: built, graded by a judge that submissions can't reach."""
