"""Not in woodfrog: here so that `import woodfrog.gpu` says what to do instead."""

from woodfrog import _not_yet

raise _not_yet("gpu")
