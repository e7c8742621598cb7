<?php

// PDO: parameters go to the server.

const ME = 'pdo';

function seen(string $what, $value): void
{
    echo "$what: $value\n";
}

$db = new PDO('pgsql:', null, null, [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION]);

function run(string $statement, array $parameters = []): PDOStatement
{
    global $db;
    $prepared = $db->prepare($statement);
    $prepared->execute($parameters);
    return $prepared;
}

// One.
run("SELECT sb_increment(:key, buffer => 'hits')", ['key' => ME . '/one']);
run('INSERT INTO hits VALUES (?)', [ME . '/one']);

// A thousand: by a prepared statement, in one statement, and by COPY.
$count = $db->prepare('INSERT INTO hits VALUES (?)');
for ($i = 0; $i < 300; $i++) {
    $count->execute([ME . '/thousand']);
}
run('INSERT INTO hits VALUES ' . implode(', ', array_fill(0, 300, '(?)')), array_fill(0, 300, ME . '/thousand'));
run('INSERT INTO hits SELECT unnest(?::text[])', ['{' . implode(',', array_fill(0, 100, ME . '/thousand')) . '}']);
$db->pgsqlCopyFromArray('hits', array_fill(0, 300, ME . '/thousand'), "\t", '\\\\N', 'path');

// A key of two columns.
run('INSERT INTO visit_counts VALUES (?, ?)', [7, ME]);
run("SELECT sb_increment(?, 1, 'visit_counts')", ['(7,' . ME . ')']);
try {
    run("SELECT sb_increment(ROW(?, ?), 1, 'visit_counts')", [7, ME]);
} catch (PDOException $error) {
    seen('row', $error->getCode());
}

// Rolled back, and not.
$db->beginTransaction();
run("SELECT sb_increment(?, 100, 'hits')", [ME . '/rollback']);
run("SELECT sb_async_increment(?, 1, 'hits')", [ME . '/rollback']);
$db->rollBack();
$db->beginTransaction();
run('INSERT INTO hits VALUES (?)', [ME . '/savepoint']);
$db->exec('SAVEPOINT s');
run('INSERT INTO hits VALUES (?, ?)', [ME . '/savepoint', 100]);
$db->exec('ROLLBACK TO SAVEPOINT s');
run('INSERT INTO hits VALUES (?)', [ME . '/savepoint']);
$db->commit();

seen('total', run("SELECT sb_total(?, 'hits')", [ME . '/one'])->fetchColumn());

// Parameters that are put into the statement by the client.
$db->setAttribute(PDO::ATTR_EMULATE_PREPARES, true);
run("SELECT sb_increment(?, 5, 'hits')", [ME . '/emulated']);
run("SELECT sb_increment(ROW(?, ?), 0, 'visit_counts')", [7, ME]);
$db->setAttribute(PDO::ATTR_EMULATE_PREPARES, false);

// The view.
$article = run('INSERT INTO article (title) VALUES (?) RETURNING id', [ME])->fetchColumn();
seen('rows', run('UPDATE article SET views = views + 1 WHERE id = ?', [$article])->rowCount());
run('UPDATE article SET views = views + ? WHERE id = ?', [1, $article]);
seen('returned', run('UPDATE article SET views = views + ? WHERE id = ? RETURNING views', [1, $article])->fetchColumn());
seen('verb', run('SELECT views FROM article WHERE id = ?', [$article])->fetchColumn());
