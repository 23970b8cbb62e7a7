"""The folder that is handed over: its manifest, the stages of a build, and how it is opened."""
