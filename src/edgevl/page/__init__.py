"""The web page: conversations with pictures and videos in a browser."""

from edgevl.page.blocks import create_page, mount_page, page_app, password_check

__all__ = ["create_page", "mount_page", "page_app", "password_check"]
