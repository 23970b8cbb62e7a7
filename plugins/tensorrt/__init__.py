"""TensorRT plugins: the project's GPU kernels as quick-deployable plugins with ahead-of-time implementations.

TensorRT embeds the PTX in the engine, so a machine that runs it needs neither Python nor a plugin library. TensorRT's
own package was not at hand: what needs it is written after its documentation and samples, and has not been run.
"""
