"""The build as resumable stages: tasks from files to files, run on an engine, each finished one marked."""
