"""Hosts of the GPU kernels: Python plugins of TensorRT-RTX (rtx_*), quick-deployable plugins of TensorRT (the rest).

Both carry their kernels as text in an attribute of a node (payload). TensorRT embeds the PTX in the engine, so a
machine that runs it needs neither Python nor a plugin library. TensorRT's own libraries were not at hand: registration,
types, shapes, tactics, launch sizes and kernels were driven through the Python front end of its release 11.4 with shape
expressions of our own; nothing was built or run.
"""
