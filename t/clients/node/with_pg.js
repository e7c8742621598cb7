// node-postgres: parameters go to the server, which finds out their types.

const { Client, Pool } = require('pg');
const { seen, run } = require('./seen');

const me = 'pg';

run(async () => {
  const db = new Client();
  await db.connect();

  // One.  Each statement is a transaction of its own.
  await db.query("SELECT sb_increment($1, buffer => 'hits')", [`${me}/one`]);
  await db.query('INSERT INTO hits VALUES ($1)', [`${me}/one`]);

  // A thousand: all at once over a pool of connections, in one statement, and by
  // a statement that the server has prepared.
  const pool = new Pool({ max: 5 });
  await Promise.all(Array.from({ length: 400 }, () =>
    pool.query('INSERT INTO hits VALUES ($1)', [`${me}/thousand`])));
  await pool.end();
  await db.query('INSERT INTO hits SELECT unnest($1::text[])', [Array(400).fill(`${me}/thousand`)]);
  for (let i = 0; i < 100; i++)
    await db.query({ name: 'count', text: "SELECT sb_increment($1, $2, 'hits')", values: [`${me}/thousand`, 2] });

  // A key of two columns.
  await db.query('INSERT INTO visit_counts VALUES ($1, $2)', [7, me]);
  await db.query("SELECT sb_increment($1, 1, 'visit_counts')", [`(7,${me})`]);
  await db.query("SELECT sb_increment(ROW($1, $2), 1, 'visit_counts')", [7, me])
    .catch((error) => seen('row', error.code));

  // Rolled back, and not.
  await db.query('BEGIN');
  await db.query("SELECT sb_increment($1, 100, 'hits')", [`${me}/rollback`]);
  await db.query("SELECT sb_async_increment($1, 1, 'hits')", [`${me}/rollback`]);
  await db.query('ROLLBACK');
  await db.query('BEGIN');
  await db.query('INSERT INTO hits VALUES ($1)', [`${me}/savepoint`]);
  await db.query('SAVEPOINT s');
  await db.query('INSERT INTO hits VALUES ($1, $2)', [`${me}/savepoint`, 100]);
  await db.query('ROLLBACK TO SAVEPOINT s');
  await db.query('INSERT INTO hits VALUES ($1)', [`${me}/savepoint`]);
  await db.query('COMMIT');

  // bigint comes as a string
  const { rows: [{ total }] } = await db.query("SELECT sb_total($1, 'hits') AS total", [`${me}/one`]);
  seen('total', total);
  seen('type', typeof total);

  // The view.
  const { rows: [{ id }] } = await db.query('INSERT INTO article (title) VALUES ($1) RETURNING id', [me]);
  seen('rows', (await db.query('UPDATE article SET views = views + 1 WHERE id = $1', [id])).rowCount);
  await db.query('UPDATE article SET views = views + $1 WHERE id = $2', [1, id]);
  seen('returned', (await db.query('UPDATE article SET views = views + $1 WHERE id = $2 RETURNING views', [1, id])).rows[0].views);
  seen('verb', (await db.query('SELECT views FROM article WHERE id = $1', [id])).rows[0].views);
  await db.end();
});
