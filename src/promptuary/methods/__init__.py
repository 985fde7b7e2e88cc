"""Published methods, one file each; the file's name is the method's name everywhere.

Knows no backbone, data set, task, solver or device.
"""
