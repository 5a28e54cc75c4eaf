"""How a client's picture comes in: as a data URL; as a web address only where the server's owner switched that on.

Promises: size, count and pixels are checked before anything is decoded; only JPEG, PNG, WebP, BMP, GIF (its first frame) and TIFF are opened, by
their content, whatever the URL claims; no path of this machine is ever read. A web address is resolved once, every address it
resolves to must be public, the connection goes to the checked address, and each redirect is checked anew.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import pybase64

from intervale.data.images import picture_size
from intervale.engine.api import Photo
from intervale.serve.errors import ApiError, bad

_DATA = re.compile(r"data:image/(jpeg|jpg|png|webp|bmp|gif|tiff);base64,", re.IGNORECASE)
_MAGIC = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"), (b"II", "tiff"), (b"MM", "tiff"))
_PORTS = {"http": 80, "https": 443}
_MOST_REDIRECTS = 3
_SMALL = 1 << 20  # letters of a data URL that are decoded faster than a thread is found for it
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class MediaLimits:
    """Of one request: pictures, bytes and pixels of each, pixels together. `remote` allows web addresses."""

    pictures: int = 8
    picture_bytes: int = 15 << 20
    picture_pixels: int = 40_000_000
    request_pixels: int = 100_000_000
    remote: bool = False
    remote_seconds: float = 10.0


async def photos_of(urls: list[tuple[str, str, int | None]], limits: MediaLimits, fetch: Callable[[str], Awaitable[bytes]]) -> list[Photo]:
    """The pictures of (place in the request, URL, most tiles). Raises: ApiError 400 with the numbers."""
    if len(urls) > limits.pictures:
        raise bad("too_many_images", f"the request has {len(urls)} pictures; the limit is {limits.pictures}", "messages")
    photos, pixels = [], 0
    for place, url, tiles in urls:
        data = await _bytes_of(url, place, limits, fetch)
        # A JPEG's header is read in microseconds; other formats may have to be decoded to know how they stand.
        quick = data.startswith(b"\xff\xd8")
        photo = checked_photo(data, place, limits, tiles) if quick else await asyncio.to_thread(checked_photo, data, place, limits, tiles)
        pixels += photo.size[0] * photo.size[1]
        if pixels > limits.request_pixels:
            raise bad("image_too_large", f"the pictures have {pixels:,} pixels together; the limit is {limits.request_pixels:,}", place)
        photos.append(photo)
    return photos


async def _bytes_of(url: str, place: str, limits: MediaLimits, fetch: Callable[[str], Awaitable[bytes]]) -> bytes:
    kind = url[:5].lower()
    if kind == "data:":
        if len(url) < _SMALL:
            return read_data_url(url, place, limits.picture_bytes)
        return await asyncio.to_thread(read_data_url, url, place, limits.picture_bytes)
    if url[:8].lower().startswith(("http://", "https://")):
        if not limits.remote:
            raise bad("remote_image_disabled", f"{place}: web addresses are off on this server; send the picture as a data URL", place)
        try:
            return await fetch(url)
        except ApiError as error:
            error.message, error.param = f"{place}: {error.message}", place
            raise
    raise bad("invalid_image_url", f"{place}: not a data URL (data:image/jpeg;base64,...)", place)


def read_data_url(url: str, place: str, most: int) -> bytes:
    """The bytes of a data URL. Raises: ApiError 400."""
    head = _DATA.match(url)
    if head is None:
        raise bad(
            "invalid_image_url", f"{place}: the data URL must begin with data:image/jpeg;base64, (or png, webp, bmp, gif, tiff)", place
        )
    size = (len(url) - head.end()) * 3 // 4
    if size > most + 2:  # padding stands for up to two bytes
        raise bad("image_too_large", f"{place}: the picture has about {size:,} bytes; the limit is {most:,}", place)
    try:
        data = pybase64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise bad("invalid_image_url", f"{place}: the data URL is not valid base64", place) from None
    if len(data) > most:
        raise bad("image_too_large", f"{place}: the picture has {len(data):,} bytes; the limit is {most:,}", place)
    return data


def checked_photo(data: bytes, place: str, limits: MediaLimits, tiles: int | None = None) -> Photo:
    """An encoded picture whose header was read and whose size is allowed. Raises: ApiError or PictureError naming `place`."""
    if len(data) > limits.picture_bytes:
        raise bad("image_too_large", f"{place}: the picture has {len(data):,} bytes; the limit is {limits.picture_bytes:,}", place)
    size = picture_size(data, place)
    if size[0] * size[1] > limits.picture_pixels:
        what = f"{place}: {size[0]}x{size[1]} is {size[0] * size[1]:,} pixels; the limit is {limits.picture_pixels:,}"
        raise bad("image_too_large", what, place)
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), "jpeg")
    return Photo(data, f"image/{kind}", size, tiles)


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a host name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Is this an address of the open internet, also where it is wrapped into another?"""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast


async def _checked(text: str, find: Resolve) -> tuple[httpx.URL, str]:
    """A web address and the public address to connect to. Raises: ApiError."""
    if not text.isascii() or re.search(r"[\x00-\x20\\\x7f]", text) or len(text) > 2000:
        raise bad("invalid_image_url", "the web address has characters that do not belong into one")
    try:
        url = httpx.URL(text)
    except Exception:
        raise bad("invalid_image_url", "not a web address") from None
    if url.scheme not in _PORTS or not re.fullmatch(r"[A-Za-z0-9.\-:]+", url.host) or url.userinfo:
        raise bad("invalid_image_url", "only http(s)://host/path is a web address here")
    if (url.port or _PORTS[url.scheme]) != _PORTS[url.scheme]:
        raise bad("invalid_image_url", "only the ports 80 (http) and 443 (https) are allowed")
    try:
        addresses = await find(url.host, _PORTS[url.scheme])
    except (OSError, UnicodeError):
        addresses = []
    # The same words for a name that does not exist and one that is not public: the answer maps no network.
    if not addresses or not all(is_public(address) for address in addresses):
        raise bad("image_fetch_refused", "this address cannot be used: it is not known, or not public")
    return url, addresses[0]


async def fetch_picture(
    text: str, limits: MediaLimits, find: Resolve = resolve, transport: httpx.AsyncBaseTransport | None = None
) -> bytes:
    """The bytes behind a public web address, within the limits of size and time. Raises: ApiError 400."""
    failed = bad("image_fetch_failed", "the picture could not be fetched")
    try:
        async with asyncio.timeout(limits.remote_seconds):
            return await _fetched(text, limits, find, transport)
    except TimeoutError:
        raise bad("image_fetch_failed", f"the picture did not come within {limits.remote_seconds:g} s") from None
    except httpx.HTTPError:
        raise failed from None


async def _fetched(text: str, limits: MediaLimits, find: Resolve, transport: httpx.AsyncBaseTransport | None) -> bytes:
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=limits.remote_seconds, transport=transport) as client:
        for _ in range(_MOST_REDIRECTS + 1):
            url, address = await _checked(text, find)
            # Connected to the address that was checked: a second look-up could give another one.
            pinned = url.copy_with(host=address)
            headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "intervale"}
            asked = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": url.host})
            answer = await client.send(asked, stream=True)
            try:
                if answer.status_code in (301, 302, 303, 307, 308):
                    if "location" not in answer.headers:
                        break
                    text = str(url.join(answer.headers["location"]))
                    continue
                if answer.status_code != 200:
                    break
                return await _read(answer, limits.picture_bytes)
            finally:
                await answer.aclose()
    raise bad("image_fetch_failed", "the picture could not be fetched (its server did not answer with a picture)")


async def _read(answer: httpx.Response, most: int) -> bytes:
    parts, size = [], 0
    async for part in answer.aiter_raw():
        size += len(part)
        if size > most:
            raise bad("image_too_large", f"the picture has more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)
