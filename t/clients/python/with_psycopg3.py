"""psycopg 3, which sends parameters to the server: what type they have, the
server finds out."""

import os

import psycopg

from seen import seen

ME = 'psycopg3'

# behind a pooler, nothing is prepared
db = psycopg.connect('', prepare_threshold=None if 'POOLED' in os.environ else 5)

# One.
db.execute("SELECT sb_increment(%s, buffer => 'hits')", [f'{ME}/one'])
db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/one'])
db.commit()

# A thousand: in pipeline mode, by executemany(), and by COPY, text and binary.
with db.pipeline():
    for _ in range(300):
        db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/thousand'])
    for _ in range(100):
        db.execute("SELECT sb_increment(%s, %s, 'hits')", [f'{ME}/thousand', 1])
    db.commit()
with db.cursor() as cursor:
    cursor.executemany('INSERT INTO hits VALUES (%s)', [[f'{ME}/thousand']] * 200)
    with cursor.copy('COPY hits (path) FROM STDIN') as copy:
        for _ in range(200):
            copy.write_row([f'{ME}/thousand'])
    with cursor.copy('COPY hits FROM STDIN (FORMAT binary)') as copy:
        copy.set_types(['text', 'int8'])
        for _ in range(100):
            copy.write_row([f'{ME}/thousand', 2])
db.commit()

# In a pipeline, what comes after an error is not run, and nothing is counted.
try:
    with db.pipeline():
        db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/error'])
        db.execute('SELECT 1 / %s', [0])
        db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/error'])
        db.commit()
except psycopg.errors.DivisionByZero:
    db.rollback()

# A key of two columns.  In ROW() the server cannot find out types.
db.execute('INSERT INTO visit_counts VALUES (%s, %s)', [7, ME])
db.execute("SELECT sb_increment(%s, 1, 'visit_counts')", [f'(7,{ME})'])
db.commit()
try:
    db.execute("SELECT sb_increment(ROW(%s, %s), 1, 'visit_counts')", [7, ME])
except psycopg.errors.IndeterminateDatatype as error:
    seen('row', error.sqlstate)
    db.rollback()
db.execute("SELECT sb_increment(ROW(%s::int, %s::text), 0, 'visit_counts')", [7, ME])
db.commit()

# Rolled back, and not.
with db.transaction(force_rollback=True):
    db.execute("SELECT sb_increment(%s, 100, 'hits')", [f'{ME}/rollback'])
    db.execute("SELECT sb_async_increment(%s, 1, 'hits')", [f'{ME}/rollback'])
with db.transaction():
    db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/savepoint'])
    with db.transaction(force_rollback=True):
        db.execute('INSERT INTO hits VALUES (%s, %s)', [f'{ME}/savepoint', 100])
    db.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/savepoint'])

# The total, as text and binary.
seen('total', db.execute("SELECT sb_total(%s, 'hits')", [f'{ME}/one']).fetchone()[0])
seen('binary total', db.execute("SELECT sb_total(%b, 'hits')", [f'{ME}/one'], binary=True).fetchone()[0])
db.commit()

# Binary parameters; and a statement that the server has prepared.
db.execute('INSERT INTO hits VALUES (%b, %b)', [f'{ME}/binary', 4])
for _ in range(6):
    db.execute("SELECT sb_increment(%b, %b, 'hits')", [f'{ME}/binary', 1], prepare=True)
db.commit()

# The view.
db.autocommit = True
article = db.execute('INSERT INTO article (title) VALUES (%s) RETURNING id', [ME]).fetchone()[0]
seen('rows', db.execute('UPDATE article SET views = views + 1 WHERE id = %s', [article]).rowcount)
with db.pipeline():
    db.execute('UPDATE article SET views = views + 1 WHERE id = %s', [article])
    returned = db.execute('UPDATE article SET views = views + %s WHERE id = %s RETURNING views', [1, article])
    seen('returned', returned.fetchone()[0])
seen('verb', db.execute('SELECT views FROM article WHERE id = %s', [article]).fetchone()[0])

# Transactions that only read may count.
db.autocommit = False
db.read_only = True
db.execute("SELECT sb_increment(%s, buffer => 'hits')", [f'{ME}/readonly'])
db.commit()
