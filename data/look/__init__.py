"""Looking at data: one sample decoded, and the page that shows a corpus."""
