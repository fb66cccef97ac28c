"""Is this a private key? Then its content is told to nobody. Pure.

When in doubt it is one: a file whose content is not shown costs less than a key that is.

Source: protocols/emissary.md, "Entitlement and file monitor" ("private keys never").
"""

import re

_NAMES = re.compile(
    r"(?:.*[._-])?key(?:[._-].*)?|.*\.(?:key|p12|pfx|jks|jceks|keystore|kdbx|ppk|pkcs12|p8|pk8|keytab)|id_[a-z0-9_]+"
    r"|.*[._-]private(?:[._-].*)?|shadow-?|gshadow-?",
    re.IGNORECASE,
)
_PUBLIC = re.compile(r".*\.pub", re.IGNORECASE)
_SAYS = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|---- BEGIN SSH2 ENCRYPTED PRIVATE|PuTTY-User-Key-File-|AGE-SECRET-KEY-1"
    rb'|<PrivateKey|\bPrivateKey\s*=|"kty"\s*:[^{}]*"d"\s*:|"d"\s*:[^{}]*"kty"\s*:|"private_key"\s*:'
)
# DER: a sequence that begins with the version of PKCS#1, PKCS#8 (0, 1), SEC 1 (1) or PKCS#12 (3). Certificates begin
# with another sequence.
_DER = re.compile(rb"0(?:\x80|[\x00-\x7f]|\x81.|\x82..|\x83...|\x84....)\x02\x01[\x00\x01\x03]", re.DOTALL)
# After two sequences: what a PKCS#8 key is encrypted with, of PKCS#5 or of PKCS#12.
_ENCRYPTED_PKCS8 = re.compile(rb".{,20}\x2a\x86\x48\x86\xf7\x0d\x01(?:\x05|\x0c\x01)", re.DOTALL)
_STORES = (
    *(b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce"),  # Java's
    *(b"\x1e\xf1\xb5\xb0", b"\x07\x02\0\0"),  # Microsoft's PVK and PRIVATEKEYBLOB
)
# OpenPGP: a secret key's packet, with its length, and the key's version. RFC 9580, 4.2 and 5.5.3.
_PGP = re.compile(rb"(?:\x94.|\x95..|\x96....|\xc5(?:[\0-\xbf]|[\xc0-\xdf].|\xff....))[\x03-\x06]", re.DOTALL)


def is_private_key(name: str, data: bytes) -> bool:
    """By the name of the file or by what is in it. `name` is the last part of its path."""
    if _NAMES.fullmatch(name) and not _PUBLIC.fullmatch(name):
        return True
    if data.startswith(_STORES) or any(kind.match(data) for kind in (_DER, _ENCRYPTED_PKCS8, _PGP)):
        return True
    return _SAYS.search(data.replace(b"\0", b"")) is not None  # UTF-16 too
