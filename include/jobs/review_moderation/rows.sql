SELECT
    review_id,
    title,
    body
FROM reviews
WHERE written_at >= :interval_start
  AND written_at < :interval_end
ORDER BY review_id
