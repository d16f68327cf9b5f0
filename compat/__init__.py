"""What the plugin uses of SGLang, looked up in the sources of every release, none imported.

sources         Python files in a folder or a wheel, parsed when asked for
definitions     a dotted name -> where it is defined, through re-exports and base classes
signatures      does a call fit a function's parameters?
uses            what our sources import, call, override and read of SGLang
hooks           the targets of our hooks
constructors    what the registry's builders make, against the constructors
places          where a name went that is no longer where it was
check           all of it for one release
releases        the wheels: which there are, and their download
report          the tables
"""
