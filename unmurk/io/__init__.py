"""Files in and out: formats, the scale of intensities, atomic writing, data sets and jobs."""
