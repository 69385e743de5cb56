"""What everyone uses: the command line, configuration, errors, files, pictures, random streams."""
