"""qcow2, QEMU's image format, versions 2 and 3 (QEMU, docs/interop/qcow2.txt).

A guest's cluster is found through two levels of tables: L1, which is kept in memory, and L2 tables, of which slices are
cached (``tables``). Every cluster of the file has a count of who refers to it (``refcounts``); one with a count of 1
may be written in place, and its L2 entry has the flag COPIED. ``header``, ``snapshots`` and ``bitmaps`` are what their
names say, ``compression`` packs clusters, ``check`` counts all references and mends, ``create`` lays out a new image.
The disk itself is a class in four parts, each upon the one before: ``mapping`` finds and reads, ``owning`` takes
clusters, gives them back and flushes, ``writing`` writes, ``image`` has its size, snapshots and all else.

The order of writes, which leaves nothing worse than leaked clusters when the power goes at any moment: a write to a new
cluster goes to the file at once, but nothing refers to it before the next flush, which writes

1. the refcounts, and makes them and all data durable (a new refcount block needs its place in the refcount table, and
   that another fdatasync);
2. the L2 slices and L1 entries that refer to those clusters, and makes them durable.

A cluster that nobody refers to any more is given to nobody else before that was made durable, nor before the transfers
that may have found it in a table have ended.
"""
