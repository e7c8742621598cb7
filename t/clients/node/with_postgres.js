// postgres.js, which prepares every statement, unless it is behind a pooler.

const postgres = require('postgres');
const { seen, run } = require('./seen');

const me = 'postgres.js';

run(async () => {
  const sql = postgres({ max: 5, prepare: !process.env.POOLED });

  // One.
  await sql`SELECT sb_increment(${`${me}/one`}, buffer => 'hits')`;
  await sql`INSERT INTO hits VALUES (${`${me}/one`})`;

  // A thousand: rows of objects, all at once, and by COPY.
  await sql`INSERT INTO hits ${sql(Array.from({ length: 400 }, () => ({ path: `${me}/thousand` })))}`;
  await Promise.all(Array.from({ length: 300 }, () => sql`INSERT INTO hits VALUES (${`${me}/thousand`})`));
  const copy = await sql`COPY hits (path) FROM STDIN`.writable();
  await new Promise((resolve, reject) => {
    copy.on('error', reject).on('finish', resolve);
    copy.end(`${me}/thousand\n`.repeat(300));
  });

  // A key of two columns.
  await sql`INSERT INTO visit_counts VALUES (${7}, ${me})`;
  await sql`SELECT sb_increment(${`(7,${me})`}, 1, 'visit_counts')`;

  // Rolled back, and not.
  await sql.begin(async (tx) => {
    await tx`SELECT sb_increment(${`${me}/rollback`}, 100, 'hits')`;
    await tx`SELECT sb_async_increment(${`${me}/rollback`}, 1, 'hits')`;
    throw new Error('undo');
  }).catch((error) => seen('rollback', error.message));
  await sql.begin(async (tx) => {
    await tx`INSERT INTO hits VALUES (${`${me}/savepoint`})`;
    await tx.savepoint(async (inner) => {
      await inner`INSERT INTO hits VALUES (${`${me}/savepoint`}, ${100})`;
      throw new Error('undo');
    }).catch((error) => seen('savepoint', error.message));
    await tx`INSERT INTO hits VALUES (${`${me}/savepoint`})`;
  });

  seen('total', (await sql`SELECT sb_total(${`${me}/one`}, 'hits') AS total`)[0].total);

  // The view.
  const [{ id }] = await sql`INSERT INTO article (title) VALUES (${me}) RETURNING id`;
  seen('rows', (await sql`UPDATE article SET views = views + 1 WHERE id = ${id}`).count);
  await sql`UPDATE article SET views = views + ${1} WHERE id = ${id}`;
  seen('returned', (await sql`UPDATE article SET views = views + ${1} WHERE id = ${id} RETURNING views`)[0].views);
  seen('verb', (await sql`SELECT views FROM article WHERE id = ${id}`)[0].views);
  await sql.end();
});
