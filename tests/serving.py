"""Requests to a server in this process."""

import asyncio
from typing import Any

import httpx2 as httpx
from fastapi import FastAPI

TOKEN = {"authorization": "Bearer secret"}


def client_of(app: FastAPI, **settings: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, **settings), base_url="http://127.0.0.1", timeout=60)


def call(app: FastAPI, method: str, path: str, **settings: Any) -> httpx.Response:
    """One request."""

    async def send() -> httpx.Response:
        async with client_of(app, raise_app_exceptions=False) as client:
            return await client.request(method, path, **settings)

    return asyncio.run(send())
