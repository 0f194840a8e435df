"""A small model shipped with the package, and the tasks that show what its cache remembers."""
