"""transformers integration; nothing here is imported before transformers itself is.

``import mokernels`` calls :func:`mokernels.hf.hook.install`, which waits for transformers. The rest
of this package imports transformers.
"""
