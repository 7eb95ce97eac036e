"""The exceptions that users of flexmore-ray meet.

    FlexmoreError              base: the command line prints it on one line and exits with 1
      UsageError               what was asked is not possible: a mixture file, a rank, a name (exit 2)
      CheckpointError          a source cannot be read, is damaged or contradicts itself
      StoreError               a store is damaged, of other weights, or holds too low a rank
      TaskError                an evaluation task cannot be loaded or run

A message says what is wrong, the rule, the value received and the way out, on one line.
"""

from __future__ import annotations


class FlexmoreError(Exception):
    """Base of every error that flexmore-ray raises on purpose."""


class UsageError(FlexmoreError, ValueError):
    """What the user asked for breaks a rule; nothing was done."""


class CheckpointError(FlexmoreError):
    """A source cannot be read, is damaged, or its parts contradict each other."""


class StoreError(FlexmoreError):
    """A store is damaged, belongs to other weights, or does not hold what was asked."""


class TaskError(FlexmoreError):
    """An evaluation task cannot be loaded, or did something other than asked."""
