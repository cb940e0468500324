"""What one would write first: FastAPI, pydantic, SQLAlchemy's ORM, and SELECT … FOR UPDATE on the exposure row.

It keeps the cap and the keys and is durable; every order is a transaction of its own. `DATABASE_URL=… python -m
bench.plain PORT`. (It refuses a repeated key instead of answering it again: that would only cost it more.)
"""

import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import ROUND_UP, Decimal
from typing import Annotated, Literal

import uvicorn
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import BigInteger, UniqueConstraint, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

CONNECTIONS = 20
RATE = Decimal("20572.78")
CAP_SATOSHI = 100 * 10**8


class Base(DeclarativeBase):
    """The tables."""


class Exposure(Base):
    """One row: what is used of the cap, and how many orders there are."""

    __tablename__ = "exposure"
    id: Mapped[int] = mapped_column(primary_key=True)
    used_satoshi: Mapped[int] = mapped_column(BigInteger)
    last_number: Mapped[int] = mapped_column(BigInteger)


class StoredOrder(Base):
    """An order."""

    __tablename__ = "orders"
    __table_args__ = (UniqueConstraint("client", "client_order_id"),)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    id: Mapped[uuid.UUID] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    client: Mapped[str]
    client_order_id: Mapped[str | None]
    currency: Mapped[str]
    amount: Mapped[Decimal]
    rate: Mapped[Decimal]
    satoshi: Mapped[int] = mapped_column(BigInteger)


class OrderRequest(BaseModel):
    """What a client sends."""

    currency: Literal["EUR", "GBP", "USD"]
    amount: Annotated[Decimal, Field(gt=0, lt=1_000_000_000, decimal_places=2)]


class OrderAnswer(BaseModel):
    """What it gets."""

    id: uuid.UUID
    number: int
    created_at: datetime
    currency: str
    amount: Decimal
    exchange_rate: Decimal
    bitcoin_amount: Decimal
    client_order_id: str | None


engine = create_async_engine(
    os.environ.get("DATABASE_URL", "").replace("postgresql:", "postgresql+asyncpg:") or "postgresql+asyncpg://",
    pool_size=CONNECTIONS,
    max_overflow=0,
)
session_of = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Makes the tables."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with session_of.begin() as session:
        if await session.get(Exposure, 1) is None:
            session.add(Exposure(id=1, used_satoshi=0, last_number=0))
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/place_order/", status_code=201)
async def place_order(asked: OrderRequest, idempotency_key: Annotated[str | None, Header()] = None) -> OrderAnswer:
    """Places an order, below the cap."""
    satoshi = int((asked.amount / RATE * 10**8).to_integral_value(ROUND_UP))
    async with session_of.begin() as session:
        exposure = (await session.execute(select(Exposure).where(Exposure.id == 1).with_for_update())).scalar_one()
        if exposure.used_satoshi + satoshi > CAP_SATOSHI:
            raise HTTPException(409, "the order would exceed the cap")
        exposure.used_satoshi += satoshi
        exposure.last_number += 1
        order = StoredOrder(
            number=exposure.last_number,
            id=uuid.uuid4(),
            created_at=datetime.now(UTC).replace(tzinfo=None),
            client="anonymous",
            client_order_id=idempotency_key,
            currency=asked.currency,
            amount=asked.amount,
            rate=RATE,
            satoshi=satoshi,
        )
        session.add(order)
    return OrderAnswer(
        id=order.id,
        number=order.number,
        created_at=order.created_at,
        currency=order.currency,
        amount=order.amount,
        exchange_rate=order.rate,
        bitcoin_amount=Decimal(satoshi).scaleb(-8),
        client_order_id=order.client_order_id,
    )


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, backlog=2048, log_level="warning"
    )
