"""TensorRT plugins: the project's GPU kernels as quick-deployable plugins with ahead-of-time implementations.

TensorRT embeds the PTX in the engine, so a machine that runs it needs neither Python nor a plugin library. TensorRT's
own libraries were not at hand: registration, types, shapes, tactics, launch sizes and kernels were driven through the
Python front end of its release 11.4 with shape expressions of our own; nothing was built or run.
"""
