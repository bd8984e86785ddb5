"""Train a CNN on handwritten digits: ``python -m trainer.task`` ends with ``mnist.h5``.

Importing the package loads nothing else; each module loads what it needs. ``trainer.config``,
``trainer.cli``, ``trainer.data.sources`` and ``trainer.errors`` work without TensorFlow.
"""

__version__ = "0.1.0"
