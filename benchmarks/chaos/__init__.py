"""What the project survives, tried out: hostile and rotten files, disks that fail, numbers that are none."""
