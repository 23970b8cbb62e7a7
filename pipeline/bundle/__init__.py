"""The folder that is handed over: its manifest, the stages of a build, how it is opened, here and on the hub."""
