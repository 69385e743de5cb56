"""What the project survives, tried out: hostile and rotten files, failing disks, numbers that are none, kills."""
