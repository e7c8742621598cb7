"""psycopg 2, which puts the parameters into the statement itself."""

import io

import psycopg2
import psycopg2.extras

from seen import seen

ME = 'psycopg2'

db = psycopg2.connect('')
cursor = db.cursor()

# One.  A transaction has begun by itself, and counts when it is committed.
cursor.execute("SELECT sb_increment(%s, buffer => 'hits')", [f'{ME}/one'])
cursor.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/one'])
db.commit()

# A thousand: statement by statement, in one statement, and by COPY.
cursor.executemany('INSERT INTO hits VALUES (%s)', [[f'{ME}/thousand']] * 400)
psycopg2.extras.execute_values(cursor, 'INSERT INTO hits (path) VALUES %s', [[f'{ME}/thousand']] * 300)
cursor.copy_expert('COPY hits (path) FROM STDIN', io.StringIO(f'{ME}/thousand\n' * 300))
db.commit()

# A key of two columns.  Parameters are literals to the server, so ROW() is
# possible, too.
cursor.execute('INSERT INTO visit_counts VALUES (%s, %s)', [7, ME])
cursor.execute("SELECT sb_increment(%s, 1, 'visit_counts')", [f'(7,{ME})'])
cursor.execute("SELECT sb_increment(ROW(%s, %s), 0, 'visit_counts')", [7, ME])
cursor.execute("SELECT sb_count(%s, 'visit_counts')", [(7, ME)])
seen('own', cursor.fetchone()[0] >= 2)
db.commit()

# Rolled back, and not.
cursor.execute("SELECT sb_increment(%s, 100, 'hits')", [f'{ME}/rollback'])
cursor.execute("SELECT sb_async_increment(%s, 1, 'hits')", [f'{ME}/rollback'])
db.rollback()
cursor.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/savepoint'])
cursor.execute('SAVEPOINT s')
cursor.execute('INSERT INTO hits VALUES (%s, %s)', [f'{ME}/savepoint', 100])
cursor.execute('ROLLBACK TO SAVEPOINT s')
cursor.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/savepoint'])
db.commit()

# An error rolls back what was counted before it.
try:
    with db, db.cursor() as other:
        other.execute('INSERT INTO hits VALUES (%s)', [f'{ME}/error'])
        other.execute('SELECT 1 / 0')
except psycopg2.errors.DivisionByZero:
    pass

cursor.execute("SELECT sb_total(%s, 'hits')", [f'{ME}/one'])
seen('total', cursor.fetchone()[0])
db.commit()

# The view.
db.autocommit = True
cursor.execute('INSERT INTO article (title) VALUES (%s) RETURNING id', [ME])
article = cursor.fetchone()[0]
for _ in range(2):
    cursor.execute('UPDATE article SET views = views + 1 WHERE id = %s', [article])
    seen('rows', cursor.rowcount)
cursor.execute('UPDATE article SET views = views + %s WHERE id = %s RETURNING views', [1, article])
seen('returned', cursor.fetchone()[0])
cursor.execute('SELECT views FROM article WHERE id = %s', [article])
seen('verb', cursor.fetchone()[0])

# Who may increment may not flush.
try:
    cursor.execute("SELECT sb_flush_all('hits')")
except psycopg2.errors.InsufficientPrivilege as error:
    seen('flush', error.diag.message_primary)
db.autocommit = False

# Transactions that only read may count.
db.set_session(readonly=True, isolation_level='SERIALIZABLE')
cursor.execute("SELECT sb_increment(%s, buffer => 'hits')", [f'{ME}/readonly'])
db.commit()
