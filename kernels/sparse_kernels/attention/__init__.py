"""One decode step of attention over a static cache: rotation and cache write, then attention of the kept heads."""
