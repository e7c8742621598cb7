"""asyncpg, which prepares every statement and sends parameters in binary."""

import asyncio
import os

import asyncpg

from seen import seen

ME = 'asyncpg'


class InTransactions(asyncpg.Connection):
    """Behind a pooler: statements are still prepared, by a message of their own,
    so each takes a transaction to come to one connection with its parameters."""

    async def execute(self, query, *args, **options):
        if not args:
            return await super().execute(query, **options)
        async with self.transaction():
            return await super().execute(query, *args, **options)

    async def executemany(self, *args, **options):
        async with self.transaction():
            return await super().executemany(*args, **options)

    async def fetchval(self, *args, **options):
        async with self.transaction():
            return await super().fetchval(*args, **options)

    async def copy_records_to_table(self, *args, **options):
        async with self.transaction():
            return await super().copy_records_to_table(*args, **options)


POOLED = {'connection_class': InTransactions, 'statement_cache_size': 0} if 'POOLED' in os.environ else {}


async def main():
    db = await asyncpg.connect(**POOLED)

    # One.
    await db.execute("SELECT sb_increment($1, buffer => 'hits')", f'{ME}/one')
    await db.execute('INSERT INTO hits VALUES ($1)', f'{ME}/one')

    # A thousand: by executemany(), from an array, and by COPY.
    await db.executemany('INSERT INTO hits VALUES ($1)', [[f'{ME}/thousand']] * 400)
    await db.execute('INSERT INTO hits SELECT unnest($1::text[])', [f'{ME}/thousand'] * 300)
    await db.copy_records_to_table('hits', records=[[f'{ME}/thousand']] * 300, columns=['path'])

    # A key of two columns.
    await db.execute('INSERT INTO visit_counts VALUES ($1, $2)', 7, ME)
    await db.execute("SELECT sb_increment($1, 1, 'visit_counts')", f'(7,{ME})')
    try:
        await db.execute("SELECT sb_increment(ROW($1, $2), 1, 'visit_counts')", 7, ME)
    except asyncpg.IndeterminateDatatypeError as error:
        seen('row', error.sqlstate)

    # Rolled back, and not.
    transaction = db.transaction()
    await transaction.start()
    await db.execute("SELECT sb_increment($1, 100, 'hits')", f'{ME}/rollback')
    await db.execute("SELECT sb_async_increment($1, 1, 'hits')", f'{ME}/rollback')
    await transaction.rollback()
    async with db.transaction():
        await db.execute('INSERT INTO hits VALUES ($1)', f'{ME}/savepoint')
        savepoint = db.transaction()
        await savepoint.start()
        await db.execute('INSERT INTO hits VALUES ($1, $2)', f'{ME}/savepoint', 100)
        await savepoint.rollback()
        await db.execute('INSERT INTO hits VALUES ($1)', f'{ME}/savepoint')

    seen('total', await db.fetchval("SELECT sb_total($1, 'hits')", f'{ME}/one'))

    # A pool of connections, all at once: none waits for another.
    async with asyncpg.create_pool(min_size=5, max_size=5, **POOLED) as pool:
        await asyncio.gather(*(
            pool.execute('INSERT INTO hits VALUES ($1)', f'{ME}/pool') for _ in range(100)))

    # The view.
    article = await db.fetchval('INSERT INTO article (title) VALUES ($1) RETURNING id', ME)
    seen('rows', await db.execute('UPDATE article SET views = views + 1 WHERE id = $1', article))
    await db.execute('UPDATE article SET views = views + $1 WHERE id = $2', 1, article)
    seen('returned', await db.fetchval('UPDATE article SET views = views + $1 WHERE id = $2 RETURNING views', 1, article))
    seen('verb', await db.fetchval('SELECT views FROM article WHERE id = $1', article))

    # Transactions that only read may count.
    async with db.transaction(readonly=True):
        await db.execute("SELECT sb_increment($1, buffer => 'hits')", f'{ME}/readonly')
    await db.close()


asyncio.run(main())
