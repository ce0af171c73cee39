"""One machine or many: the commands that set up, test, demonstrate and start runs."""
