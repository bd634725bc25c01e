"""Network block devices: the client's side of the NBD protocol.

The specification is the NBD project's ``doc/proto.md``, whose names are used. ``address`` is how an export is named;
``handshake`` agrees with the server ("fixed newstyle"); ``connection`` sends requests and takes replies;
``client`` is the export as a file that formats lie over. What a server says is not trusted.
"""
