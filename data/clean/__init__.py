"""From documents as read to documents worth training on: normalisation, language, quality, decontamination."""
