<?php

// Eloquent, Laravel's ORM: models on the view and on a buffer.

use Illuminate\Database\Capsule\Manager;
use Illuminate\Database\Eloquent\Model;

require 'Illuminate/Database/autoload.php';

const ME = 'eloquent';

function seen(string $what, $value): void
{
    echo "$what: $value\n";
}

class Article extends Model
{
    protected $table = 'article';
    public $timestamps = false;
    protected $guarded = [];
}

class Hit extends Model
{
    protected $table = 'hits';
    protected $primaryKey = 'path';
    public $incrementing = false;
    protected $keyType = 'string';
    public $timestamps = false;
    protected $guarded = [];
}

$manager = new Manager();
$manager->addConnection([
    'driver' => 'pgsql',
    'host' => getenv('PGHOST'),
    'port' => getenv('PGPORT'),
    'database' => getenv('PGDATABASE'),
    'username' => getenv('PGUSER'),
    'password' => '',
]);
$manager->bootEloquent();
$db = $manager->getConnection();

// One.
$db->select("SELECT sb_increment(?, buffer => 'hits')", [ME . '/one']);
Hit::create(['path' => ME . '/one']);

// A thousand.
Hit::insert(array_fill(0, 900, ['path' => ME . '/thousand']));
$db->transaction(function () {
    for ($i = 0; $i < 100; $i++) {
        Hit::create(['path' => ME . '/thousand']);
    }
});

// A key of two columns.
$db->table('visit_counts')->insert(['page' => 7, 'lang' => ME]);
$db->select("SELECT sb_increment(?, 1, 'visit_counts')", ['(7,' . ME . ')']);

// Rolled back, and not.
$db->beginTransaction();
$db->select("SELECT sb_increment(?, 100, 'hits')", [ME . '/rollback']);
$db->select("SELECT sb_async_increment(?, 1, 'hits')", [ME . '/rollback']);
$db->rollBack();
$db->beginTransaction();
Hit::create(['path' => ME . '/savepoint']);
$db->beginTransaction();
Hit::create(['path' => ME . '/savepoint', 'views' => 100]);
$db->rollBack();
Hit::create(['path' => ME . '/savepoint']);
$db->commit();

seen('total', $db->selectOne("SELECT sb_total(?, 'hits') AS total", [ME . '/one'])->total);

// The view.
$article = Article::create(['title' => ME]);
seen('rows', $article->increment('views'));
Article::where('id', $article->id)->increment('views');
$article->increment('views', 1, ['title' => ME]);
seen('verb', $article->refresh()->views);

// Buffers cannot be updated.
try {
    Hit::where('path', ME . '/one')->increment('views');
} catch (Illuminate\Database\QueryException $error) {
    seen('update', $error->getCode());
}
